"""The rules that choose a recipe's settings from the parent, the data and the machine, each with its reason. Light.

A rule is a pure function of a few facts that returns a `Setting`. `tessera init` writes them all into a recipe, and
`filled_settings` fills by them what a recipe leaves out; `tessera plan` says them again where a recipe has what they
would choose.
"""
