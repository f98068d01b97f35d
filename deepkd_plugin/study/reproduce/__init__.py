"""`deepkd reproduce`: a table's runs planned and made; report/ reads what they left."""
