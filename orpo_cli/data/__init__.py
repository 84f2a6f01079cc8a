"""Preference data: rows -> pairs -> token ids -> one flat batch."""
