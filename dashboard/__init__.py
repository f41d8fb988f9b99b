"""Streamlit pages over the planner."""
