"""One module per page, each with a function `page` that `app` calls.

Not called `pages`: Streamlit would run the modules of a folder of that name by itself, without the sidebar.
"""
