"""A Databricks workspace on loopback, and what the registry code does against it."""
