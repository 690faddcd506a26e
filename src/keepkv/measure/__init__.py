"""What a measurement is made with and made of: versions, memory, ledgers, rows."""
