"""What a run leaves behind for people: callbacks, pictures, tables, the page, the ranking of distrusted labels."""
