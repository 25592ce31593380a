"""What a search shows: tables, pictures, findings."""
