"""How large the work of a recipe is: what it runs on, what each stage takes, and the recipe that suits both."""
