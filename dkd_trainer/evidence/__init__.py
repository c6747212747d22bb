"""What students are worth: subjects, measurements, reports, ablations."""
