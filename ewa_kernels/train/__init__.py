"""What runs after a step: averaging of experts, its schedules, AdamW that averages, and sharded experts."""
