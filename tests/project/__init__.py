"""The repository itself: documents, imports, packages."""
