"""Pictures: files of every format as samples with what stands beside them, and back."""
