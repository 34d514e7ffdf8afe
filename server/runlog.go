package server

import (
	"bytes"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// A runLog is where the output of one run goes: into its file, from which those
// who wait read at their own pace. It keeps the last lines for the message of a
// failure. It is written by one goroutine; the counters may be read by all.
type runLog struct {
	file    io.Writer // *store.BuildLog
	close   func() error
	started time.Time
	size    atomic.Int64
	last    atomic.Int64 // when something was written, Unix nanoseconds
	tail    logTail
}

func newRunLog(file io.WriteCloser, now time.Time) *runLog {
	l := &runLog{file: file, close: sync.OnceValue(file.Close), started: now}
	l.last.Store(now.UnixNano())
	return l
}

// Write implements io.Writer.
func (l *runLog) Write(p []byte) (int, error) {
	n, err := l.file.Write(p)
	l.tail.Write(p[:n])
	l.size.Add(int64(n))
	l.last.Store(time.Now().UnixNano())
	return n, err
}

// Close ends the log; those who read it come to its end. It may be called
// again, also while it is under way, and returns the same.
func (l *runLog) Close() error { return l.close() }

// silentSince returns when something was last written, or the start.
func (l *runLog) silentSince() time.Time { return time.Unix(0, l.last.Load()) }

// A logTail keeps the last lines of a log, as many and as long as fit a
// message. Lines addressed to Nix are left out.
type logTail struct {
	lines   [][]byte // at most tailLines
	current []byte   // at most tailWidth
	cut     bool     // current was longer
	back    bool     // a carriage return came last: what follows overwrites current
}

// The bounds of a logTail: as many lines as Nix shows by default, and bytes of
// each.
const (
	tailLines = 25
	tailWidth = 500
)

// Write takes the next bytes of the log. It never fails.
func (t *logTail) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		i := bytes.IndexAny(p, "\r\n")
		if i < 0 {
			t.add(p)
			break
		}
		t.add(p[:i])
		if p[i] == '\n' {
			t.end()
		} else {
			t.back = true
		}
		p = p[i+1:]
	}
	return n, nil
}

func (t *logTail) add(p []byte) {
	if len(p) > 0 && t.back {
		t.current, t.cut, t.back = t.current[:0], false, false
	}
	room := tailWidth - len(t.current)
	if len(p) > room {
		p, t.cut = p[:room], true
	}
	t.current = append(t.current, p...)
}

func (t *logTail) end() {
	if !bytes.HasPrefix(t.current, []byte("@nix ")) {
		line := bytes.Clone(t.current)
		if t.cut {
			line = append(line, "…"...)
		}
		if len(t.lines) == tailLines {
			copy(t.lines, t.lines[1:])
			t.lines = t.lines[:tailLines-1]
		}
		t.lines = append(t.lines, line)
	}
	t.current, t.cut, t.back = t.current[:0], false, false
}

// Lines returns the last lines, one without newline included.
func (t *logTail) Lines() []string {
	if len(t.current) > 0 {
		t.end()
	}
	lines := make([]string, len(t.lines))
	for i, line := range t.lines {
		lines[i] = string(line)
	}
	return lines
}
