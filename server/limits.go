package server

import (
	"strconv"
	"strings"
	"time"
)

// envPrefixes are those of settings in a session's environment; the first one
// wins.
var envPrefixes = [...]string{"NBD_", "NIXBUILDNET_"}

// setting returns the value of a setting in a session's environment and the
// variable that holds it; "" if it is not set or empty.
func setting(env map[string]string, name string) (variable, value string) {
	for _, prefix := range envPrefixes {
		if v := strings.TrimSpace(env[prefix+name]); v != "" {
			return prefix + name, v
		}
	}
	return "", ""
}

// limits returns those under which a request's builds run: what the client
// sent with the request, else what its session's environment says, and at most
// what the operator allows.
func (b *Builds) limits(env map[string]string, sent Limits) (Limits, error) {
	timeout, err := settingNumber(env, "TIMEOUT", "seconds")
	if err != nil {
		return Limits{}, err
	}
	silent, err := settingNumber(env, "MAX_SILENT_TIME", "seconds")
	if err != nil {
		return Limits{}, err
	}
	size, err := settingNumber(env, "MAX_LOG_SIZE", "bytes")
	if err != nil {
		return Limits{}, err
	}
	top := b.cfg.Limits
	return Limits{
		Timeout:    atMost(top.Timeout, first(sent.Timeout, time.Duration(min(silentMax, timeout))*time.Second)),
		MaxSilent:  atMost(top.MaxSilent, first(sent.MaxSilent, time.Duration(min(silentMax, silent))*time.Second)),
		MaxLogSize: atMost(top.MaxLogSize, first(sent.MaxLogSize, size)),
	}, nil
}

// silentMax bounds limits in seconds, so that they fit a Duration.
const silentMax = 1 << 32

// settingNumber returns a setting that counts something, 0 if it is not set.
func settingNumber(env map[string]string, name, unit string) (int64, error) {
	variable, value := setting(env, name)
	if value == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil || n < 0 {
		return 0, refusef("%s is %q, and should be a number of %s", variable, value, unit)
	}
	return n, nil
}

// first returns a unless it is not set.
func first[T int64 | time.Duration](a, b T) T {
	if a > 0 {
		return a
	}
	return b
}

// atMost returns the limit n under a ceiling; zero of either means none.
func atMost[T int64 | time.Duration](ceiling, n T) T {
	if n <= 0 || ceiling > 0 && n > ceiling {
		return ceiling
	}
	return n
}

// stricter reports whether limit a ends a build that b lets go on.
func stricter[T int64 | time.Duration](a, b T) bool { return a > 0 && (b <= 0 || a < b) }
