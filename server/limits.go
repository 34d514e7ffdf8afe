package server

import "time"

// atMost returns the limit n under a ceiling; zero of either means none.
func atMost[T int64 | time.Duration](ceiling, n T) T {
	if n <= 0 || ceiling > 0 && n > ceiling {
		return ceiling
	}
	return n
}

// stricter reports whether limit a ends a build that b lets go on.
func stricter[T int64 | time.Duration](a, b T) bool { return a > 0 && (b <= 0 || a < b) }
