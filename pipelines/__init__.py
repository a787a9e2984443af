"""Picks and orders the stages: recipe, KFP pipeline, local runner, command."""
