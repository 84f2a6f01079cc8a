"""Preference data: rows -> pairs -> token ids -> one flat batch.

Reading order: `rows`, `readers`, `names`, `library`, `sources`, `columns`, `advice`, `formats`, `templates`, `guard`,
`tokenize`, `bitmap`, `keys`, `pairs`, `survey`, `order`, `dataset`, `batches`, `statistics`.
"""
