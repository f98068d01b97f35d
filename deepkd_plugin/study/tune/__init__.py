"""`deepkd tune`: learning rate, warm-up, Δ and mask of a table's methods, chosen on held-out training images."""
