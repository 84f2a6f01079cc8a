"""The recipe: schema, strict loading, other tools' names."""
