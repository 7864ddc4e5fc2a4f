"""Pure estimates, without Lightning, of what can be trusted: labels, teachers, terms; and which rows to ask about."""
