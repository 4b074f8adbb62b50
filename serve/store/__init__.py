"""The store: which archives there are, unpacked where packed, read ahead, replaced in one step."""
