"""Rows that are made from passages and accepted questions: rewritings of documents, and questions that need two facts."""
