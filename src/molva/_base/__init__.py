"""What every part needs and no part owns: time, ids, redaction. Knows no domain."""
