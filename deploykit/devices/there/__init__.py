"""What is copied to devices and runs there: it imports nothing of deploykit's."""
