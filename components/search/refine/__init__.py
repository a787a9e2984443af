"""What is measured on whole models after the first solution."""
