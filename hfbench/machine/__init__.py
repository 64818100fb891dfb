"""What this computer is and can do, and what is switched for a whole process."""
