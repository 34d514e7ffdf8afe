package main

import (
	"strings"

	"golang.org/x/sys/unix"
)

// limits prints what the shell noted before this program, whose runtime raises
// the number of files, and what can be done about them.
func limits() {
	for line := range strings.SplitSeq(text("/build/limits"), "\n") {
		if len(line) < 60 || strings.HasPrefix(line, "Limit ") {
			continue
		}
		f := strings.Fields(line[26:])
		name := strings.TrimSpace(line[:26])
		put("limit "+name+" soft", "%s", f[0])
		put("limit "+name+" hard", "%s", f[1])
	}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NICE, &l); err == nil {
		l.Max += 5
		try("raise a hard limit", unix.Setrlimit(unix.RLIMIT_NICE, &l))
	}
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &l); err == nil {
		l.Cur = l.Max
		try("raise core limit", unix.Setrlimit(unix.RLIMIT_CORE, &l))
		put("core limit", "%v", l.Cur == unix.RLIM_INFINITY)
	}
	if err := unix.Getrlimit(unix.RLIMIT_STACK, &l); err == nil {
		l.Cur = l.Max
		try("raise stack limit", unix.Setrlimit(unix.RLIMIT_STACK, &l))
	}
	put("umask", "%03o", unix.Umask(0o22))
}
