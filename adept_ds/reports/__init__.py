"""What people read: pages, tables and plots of one run or many."""
