"""What pages ask of the planner: questions from inputs, long work in other processes, uploads. Free of Streamlit."""
