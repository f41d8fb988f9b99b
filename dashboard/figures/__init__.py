"""Plain functions from the planner's results to Plotly figures. Free of Streamlit."""
