"""What a run tells: numbers to files, a line to the person who watches, figures at the end."""
