package server

import (
	"sync"
	"time"
)

// dampedLines is how many lines of a kind a damper lets through in a minute.
const dampedLines = 60

// A damper keeps strangers from filling the log: of what anybody can cause as
// often as he likes, it lets so many lines through in a minute. Its zero value
// is ready, and safe for concurrent use.
type damper struct {
	mu      sync.Mutex // guards what follows
	since   time.Time  // when the minute began
	lines   int        // in that minute
	dropped int        // since the last line that passed
}

// pass reports whether a line may be logged now, and how many were not before
// it.
func (d *damper) pass(now time.Time) (ok bool, dropped int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now.Sub(d.since) >= time.Minute {
		d.since, d.lines = now, 0
	}
	if d.lines == dampedLines {
		d.dropped++
		return false, 0
	}
	d.lines++
	dropped, d.dropped = d.dropped, 0
	return true, dropped
}
