package server

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"nbd/nixproto"
)

// messageSize is about what a log message takes on the wire beside its texts.
const messageSize = 128

// An activityIDs gives out the ids of a session's activities. A client that
// builds on several machines merges the ids of all of them with its own, which
// are its process id shifted by 32; so the upper half is random and larger than
// any process id.
type activityIDs struct {
	mu   sync.Mutex
	last uint64
}

func newActivityIDs() *activityIDs {
	const maxPid = 1 << 22 // on 64-bit Linux
	high := 2*maxPid + rand.Uint64N(1<<31-2*maxPid)
	return &activityIDs{last: high << 32}
}

func (a *activityIDs) next() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last++
	return a.last
}

// A workerLog is the LogSink of one operation of the worker protocol: it tells
// of builds in the messages and the order that a real daemon uses.
//
//	Realise ── Builds ── CopyPaths      the first time anything is told
//	   └── Build, its lines, its end    for each build
//	the ends of the three               when the operation ends
type workerLog struct {
	out *outbox
	ids *activityIDs

	mu     sync.Mutex // guards what follows
	opened []uint64   // ids of the enclosing activities, in order
	builds uint64     // id of the one among them that has the progress
	closed bool
}

func (l *workerLog) send(m nixproto.LogMessage, size int) {
	l.mu.Lock()
	closed := l.closed
	l.mu.Unlock()
	if !closed {
		l.out.message(m, messageSize+size)
	}
}

// open starts the enclosing activities once, and returns the one for progress.
func (l *workerLog) open() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.opened != nil {
		return l.builds
	}
	for _, t := range []nixproto.ActivityType{nixproto.ActRealise, nixproto.ActBuilds, nixproto.ActCopyPaths} {
		id := l.ids.next()
		l.opened = append(l.opened, id)
		if t == nixproto.ActBuilds {
			l.builds = id
		}
		l.out.message(&nixproto.LogStartActivity{ID: id, Type: t}, messageSize)
	}
	return l.builds
}

// close ends the enclosing activities. Nothing is sent after it.
func (l *workerLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.opened {
		l.out.message(&nixproto.LogStopActivity{ID: l.opened[len(l.opened)-1-i]}, messageSize)
	}
	l.opened, l.closed = nil, true
}

// StartBuild implements LogSink.
func (l *workerLog) StartBuild(drv nixproto.StorePath) BuildLog {
	l.open()
	b := &workerBuildLog{log: l, id: l.ids.next()}
	b.cut = lineCutter{line: b.line, phase: b.phase, note: l.Note}
	l.send(&nixproto.LogStartActivity{
		ID:    b.id,
		Level: nixproto.LevelInfo,
		Type:  nixproto.ActBuild,
		Text:  fmt.Sprintf("building '%s'", drv),
		Fields: []nixproto.Field{nixproto.TextField(string(drv)), nixproto.TextField(""),
			nixproto.NumberField(1), nixproto.NumberField(1)},
	}, 2*len(drv))
	return b
}

// StartWait implements LogSink.
func (l *workerLog) StartWait(drv nixproto.StorePath, why string) (stop func()) {
	l.open()
	id := l.ids.next()
	l.send(&nixproto.LogStartActivity{
		ID:     id,
		Level:  nixproto.LevelInfo,
		Type:   nixproto.ActBuildWaiting,
		Text:   why,
		Fields: []nixproto.Field{nixproto.TextField(string(drv))},
	}, len(why)+len(drv))
	return sync.OnceFunc(func() { l.send(&nixproto.LogStopActivity{ID: id}, 0) })
}

// StartCopy implements LogSink.
func (l *workerLog) StartCopy(path nixproto.StorePath, from string) (stop func()) {
	id := l.ids.next()
	l.send(&nixproto.LogStartActivity{
		ID:     id,
		Level:  nixproto.LevelInfo,
		Type:   nixproto.ActCopyPath,
		Text:   copyText(path, from),
		Fields: []nixproto.Field{nixproto.TextField(string(path)), nixproto.TextField(from), nixproto.TextField("local")},
	}, 2*(len(path)+len(from)))
	return sync.OnceFunc(func() { l.send(&nixproto.LogStopActivity{ID: id}, 0) })
}

func copyText(path nixproto.StorePath, from string) string {
	return fmt.Sprintf("copying path '%s' from '%s'", path, from)
}

// Progress implements LogSink.
func (l *workerLog) Progress(done, expected, running, failed uint64) {
	id := l.open()
	l.send(&nixproto.LogResult{ID: id, Type: nixproto.ResProgress, Fields: []nixproto.Field{
		nixproto.NumberField(done), nixproto.NumberField(expected),
		nixproto.NumberField(running), nixproto.NumberField(failed),
	}}, messageSize)
}

// Note implements LogSink.
func (l *workerLog) Note(text string) {
	l.send(&nixproto.LogNext{Text: text + "\n"}, len(text))
}

// A workerBuildLog cuts one builder's output into the results of an activity.
type workerBuildLog struct {
	log *workerLog
	id  uint64
	cut lineCutter
}

func (b *workerBuildLog) line(line []byte) {
	b.result(nixproto.ResBuildLogLine, string(line))
}

func (b *workerBuildLog) phase(name string) { b.result(nixproto.ResSetPhase, name) }

func (b *workerBuildLog) result(t nixproto.ResultType, text string) {
	b.log.send(&nixproto.LogResult{ID: b.id, Type: t, Fields: []nixproto.Field{nixproto.TextField(text)}}, len(text))
}

// Write implements BuildLog.
func (b *workerBuildLog) Write(p []byte) (int, error) { return b.cut.Write(p) }

// Stop implements BuildLog.
func (b *workerBuildLog) Stop() {
	b.cut.Flush()
	b.log.send(&nixproto.LogStopActivity{ID: b.id}, 0)
}

// A serveLog is the LogSink of the serve protocol, where the log is what
// arrives on the channel's stderr: the builders' bytes as they are, and nothing
// around them, since the client keeps it as the log of the build.
//
// A client passes stderr and stdout on through two pipes, and ends with the
// answer: what it had not read of a log by then is lost, the end of it, which
// matters most. Nothing tells how much that is. So an answer comes as much
// later as a slow reader takes for what was written just before (settle); of a
// log that grew at a builder's pace that is nothing, but one that is replayed
// comes in one piece.
type serveLog struct {
	mu     sync.Mutex // a Write is whole; guards what follows
	w      io.Writer
	unread int64 // bytes that a slow reader has before it, when at was
	at     time.Time
}

const (
	slowReader = 4 << 20 // bytes a second
	mostUnread = 2 << 20 // what SSH lets be on its way to a client
)

func (l *serveLog) write(p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, _ = l.w.Write(p) // the reading side learns that the client is gone
	l.unread = min(l.unreadLocked()+int64(len(p)), mostUnread)
}

// unreadLocked is what a slow reader has before it now.
func (l *serveLog) unreadLocked() int64 {
	now := time.Now()
	read := int64(now.Sub(l.at).Seconds() * slowReader)
	l.at = now
	l.unread = max(0, l.unread-read)
	return l.unread
}

// settle waits until a slow reader has read what was written.
func (l *serveLog) settle(ctx context.Context) {
	l.mu.Lock()
	wait := time.Duration(l.unreadLocked()) * time.Second / slowReader
	l.mu.Unlock()
	if wait < time.Millisecond {
		return
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// StartBuild implements LogSink.
func (l *serveLog) StartBuild(nixproto.StorePath) BuildLog { return &serveBuildLog{log: l} }

// StartWait implements LogSink.
func (l *serveLog) StartWait(_ nixproto.StorePath, why string) (stop func()) {
	l.Note(why)
	return func() {}
}

// StartCopy implements LogSink.
func (l *serveLog) StartCopy(path nixproto.StorePath, from string) (stop func()) {
	l.Note(copyText(path, from))
	return func() {}
}

// Progress implements LogSink; a plain log has no place for it.
func (l *serveLog) Progress(_, _, _, _ uint64) {}

// Note implements LogSink.
func (l *serveLog) Note(text string) { l.write([]byte(text + "\n")) }

// A serveBuildLog passes one builder's output on.
type serveBuildLog struct {
	log  *serveLog
	open bool // the last line has no newline yet
}

// Write implements BuildLog.
func (b *serveBuildLog) Write(p []byte) (int, error) {
	if len(p) > 0 {
		b.log.write(p)
		b.open = p[len(p)-1] != '\n'
	}
	return len(p), nil
}

// Stop implements BuildLog.
func (b *serveBuildLog) Stop() {
	if b.open {
		b.log.write([]byte("\n"))
	}
}
