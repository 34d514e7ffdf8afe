package server

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"nbd/nixproto"
)

const testDrv = nixproto.StorePath("/nix/store/00000000000000000000000000000000-a.drv")

// messages decodes what an outbox wrote.
func messages(t *testing.T, b []byte) []nixproto.LogMessage {
	t.Helper()
	var list []nixproto.LogMessage
	r := nixproto.NewReader(bytes.NewReader(b))
	for r.Await() == nil {
		m, err := nixproto.ReadLog(r, nixproto.MaxWorker)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, m)
	}
	return list
}

// shape writes a message without its ids, which are random, but for their order.
func shape(ids map[uint64]int, m nixproto.LogMessage) string {
	id := func(n uint64) int {
		if ids[n] == 0 {
			ids[n] = len(ids) + 1
		}
		return ids[n]
	}
	fields := func(list []nixproto.Field) string {
		var s []string
		for _, f := range list {
			if f.IsText {
				s = append(s, fmt.Sprintf("%q", f.Text))
			} else {
				s = append(s, fmt.Sprint(f.Number))
			}
		}
		return strings.Join(s, " ")
	}
	switch m := m.(type) {
	case *nixproto.LogStartActivity:
		return fmt.Sprintf("start %d level %d type %d %q [%s]", id(m.ID), m.Level, m.Type, m.Text, fields(m.Fields))
	case *nixproto.LogStopActivity:
		return fmt.Sprintf("stop %d", id(m.ID))
	case *nixproto.LogResult:
		return fmt.Sprintf("result %d type %d [%s]", id(m.ID), m.Type, fields(m.Fields))
	case *nixproto.LogNext:
		return fmt.Sprintf("next %q", m.Text)
	case *nixproto.LogLast:
		return "last"
	case *nixproto.LogError:
		return fmt.Sprintf("error %q", m.Message)
	default:
		return fmt.Sprintf("%T", m)
	}
}

func TestWorkerLog(t *testing.T) {
	var got bytes.Buffer
	out := newOutbox(&got)
	out.v = nixproto.MaxWorker
	l := &workerLog{out: out, ids: newActivityIDs()}
	stop := l.StartWait(testDrv, "waiting for a machine")
	stop()
	stop()
	l.Progress(0, 1, 0, 0)
	b := l.StartBuild(testDrv)
	fmt.Fprint(b, "one\ntw")
	l.Note("by the way")
	fmt.Fprint(b, "o\n", `@nix {"action":"setPhase","phase":"check"}`, "\nrest")
	b.Stop()
	l.close()
	l.Note("too late")
	stop()
	out.last(nil)
	var shapes []string
	ids := map[uint64]int{}
	for _, m := range messages(t, got.Bytes()) {
		shapes = append(shapes, shape(ids, m))
	}
	want := []string{
		`start 1 level 0 type 102 "" []`,
		`start 2 level 0 type 104 "" []`,
		`start 3 level 0 type 103 "" []`,
		`start 4 level 3 type 111 "waiting for a machine" ["` + string(testDrv) + `"]`,
		`stop 4`,
		`result 2 type 105 [0 1 0 0]`,
		`start 5 level 3 type 105 "building '` + string(testDrv) + `'" ["` + string(testDrv) + `" "" 1 1]`,
		`result 5 type 101 ["one"]`,
		`next "by the way\n"`,
		`result 5 type 101 ["two"]`,
		`result 5 type 104 ["check"]`,
		`result 5 type 101 ["rest"]`,
		`stop 5`,
		`stop 3`, `stop 2`, `stop 1`,
		`last`,
	}
	if diff := cmp.Diff(want, shapes); diff != "" {
		t.Error(diff)
	}
	for id := range ids {
		if high := id >> 32; high < 1<<23 || high >= 1<<31 {
			t.Errorf("id %#x can be a process's", id)
		}
	}
}

func TestServeLog(t *testing.T) {
	var got bytes.Buffer
	l := &serveLog{w: &got}
	b := l.StartBuild(testDrv)
	for _, p := range []string{"a\r\x00", "", "b\nlast"} {
		fmt.Fprint(b, p)
	}
	b.Stop()
	l.StartBuild(testDrv).Stop()
	l.StartWait(testDrv, "waits")()
	l.Note("note")
	if want := "a\r\x00b\nlast\nwaits\nnote\n"; got.String() != want {
		t.Errorf("got %q", got.String())
	}
}

// chunks remembers each Write.
type chunks struct {
	mu   sync.Mutex
	list [][]byte
	more chan struct{}
}

func (c *chunks) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.list = append(c.list, bytes.Clone(p))
	c.mu.Unlock()
	select {
	case c.more <- struct{}{}:
	default:
	}
	return len(p), nil
}

// TestOutboxWholeMessages: whatever the sizes, what was written at any time ends
// with a whole message, unless that is longer than the buffer.
func TestOutboxWholeMessages(t *testing.T) {
	got := &chunks{more: make(chan struct{}, 1)}
	out := newOutbox(got)
	out.v = nixproto.MaxWorker
	l := &workerLog{out: out, ids: newActivityIDs()}
	b := l.StartBuild(testDrv)
	for i := range 2000 {
		fmt.Fprintln(b, strings.Repeat("x", i*7%3001))
	}
	b.Stop()
	out.flush()
	var all []byte
	for _, p := range got.list {
		messages(t, p) // fails for a part of a message
		all = append(all, p...)
	}
	if n := len(messages(t, all)); n != 3+1+2000+1 {
		t.Errorf("%d messages", n)
	}
	if len(got.list) > len(all)/(flushAt/2) {
		t.Errorf("%d bytes in %d writes", len(all), len(got.list))
	}
}

// TestOutboxTimer: a lonely message is sent without anything after it.
func TestOutboxTimer(t *testing.T) {
	got := &chunks{more: make(chan struct{}, 1)}
	out := newOutbox(got)
	out.v = nixproto.MaxWorker
	for range 3 {
		out.message(&nixproto.LogNext{Text: "hello\n"}, 200)
		<-got.more
	}
	out.message(&nixproto.LogNext{Text: "hello\n"}, 200)
	out.fail("no")
	got.mu.Lock()
	defer got.mu.Unlock()
	if n := len(got.list); n != 4 {
		t.Errorf("%d writes", n)
	}
}

// An answer waits for a log that came in one piece, not for one that grew.
func TestServeLogSettles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		settled := func(l *serveLog) time.Duration {
			start := time.Now()
			l.settle(t.Context())
			return time.Since(start)
		}
		l := &serveLog{w: io.Discard}
		if d := settled(l); d != 0 {
			t.Errorf("no log: waited %v", d)
		}
		build := l.StartBuild(testDrv)
		for range 32 {
			fmt.Fprint(build, strings.Repeat("x", 32<<10))
		}
		if d := settled(l); d != 250*time.Millisecond {
			t.Errorf("1 MiB at once: waited %v", d)
		}
		if d := settled(l); d != 0 {
			t.Errorf("again: waited %v", d)
		}
		for range 100 {
			fmt.Fprint(build, "a line of log")
			time.Sleep(10 * time.Millisecond)
		}
		if d := settled(l); d != 0 {
			t.Errorf("lines that came slowly: waited %v", d)
		}
		fmt.Fprint(build, strings.Repeat("x", 32<<20))
		if d := settled(l); d != 500*time.Millisecond {
			t.Errorf("32 MiB, of which SSH has 2 under way: waited %v", d)
		}
	})
}
