"""From a choice to a model: assembly and FFN fusion."""
