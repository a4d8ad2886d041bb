"""Tests, by what they are about; CONTRIBUTING.md says what each folder is for and costs."""
