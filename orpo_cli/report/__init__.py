"""What a run says: metrics file and terminal."""
