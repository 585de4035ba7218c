"""What joins the rooms for the user: models by name, the Refusal Card, run folders."""
