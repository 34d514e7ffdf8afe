package main

import (
	"strconv"

	"golang.org/x/sys/unix"
)

func octal(n uint32) string  { return strconv.FormatUint(uint64(n), 8) }
func decimal(n int64) string { return strconv.FormatInt(n, 10) }

// timespec is a time in seconds, as far as the machine's type can hold it.
func timespec(seconds int64) unix.Timespec {
	return unix.NsecToTimespec(seconds * 1e9)
}
