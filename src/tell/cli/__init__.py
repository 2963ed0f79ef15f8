"""The command line: one file a verb; each parses, makes one public call, and prints."""
