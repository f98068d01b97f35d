"""What becomes of a student after its training: it is loaded, tested, exported, used and published."""
