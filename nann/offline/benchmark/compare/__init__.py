"""Every way to retrieve the same items, side by side: one model, one corpus, the same users."""
