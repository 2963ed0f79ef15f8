"""Where cells run: this process (`local`), or a Ray cluster (`ray`)."""
