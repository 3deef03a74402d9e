"""An experiment: how well are items ranked that training never saw, by what is read of their texts?"""
