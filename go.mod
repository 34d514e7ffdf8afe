module nbd

go 1.26
