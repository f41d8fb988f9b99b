"""One module per page; each is a script that `app` runs.

Not called `pages`: Streamlit would run the scripts of a folder of that name by itself, without the sidebar.
"""
