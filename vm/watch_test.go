package vm

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"nbd/vm/link"
)

func TestWatch(t *testing.T) {
	start := time.Unix(1_000_000, 0)
	at := func(s float64) time.Time { return start.Add(time.Duration(s * float64(time.Second))) }
	for _, tt := range []struct {
		name   string
		accel  string
		spec   Spec
		do     func(w *watch)
		at     time.Time
		kind   Kind // 0: our failure
		reason string
	}{
		{name: "not started", accel: "kvm", do: func(w *watch) { w.beat = at(59) }, at: at(60), reason: "did not start"},
		{name: "not started, emulated", accel: "tcg", do: func(w *watch) { w.beat = at(599) }, at: at(600), reason: "did not start"},
		{name: "no beat", accel: "kvm", do: func(w *watch) { w.enter(phaseRunning, at(1)); w.beat = at(10) }, at: at(40), reason: "no sign of life"},
		{name: "no beat, emulated", accel: "tcg", do: func(w *watch) { w.enter(phaseRunning, at(1)); w.beat = at(10) }, at: at(310), reason: "no sign of life"},
		{name: "timeout", accel: "tcg", spec: Spec{Timeout: 100 * time.Second, MaxSilent: 99 * time.Second},
			do: func(w *watch) { w.enter(phaseRunning, at(5)); w.active = at(50) }, at: at(105), kind: TimedOut, reason: "timed out after 100 seconds"},
		{name: "silence", accel: "tcg", spec: Spec{Timeout: 100 * time.Second, MaxSilent: 9 * time.Second},
			do: func(w *watch) { w.enter(phaseRunning, at(5)); w.active = at(50) }, at: at(59), kind: Silent, reason: "9 seconds of silence"},
		{name: "silence from the start", accel: "tcg", spec: Spec{MaxSilent: 9 * time.Second},
			do: func(w *watch) { w.enter(phaseRunning, at(5)) }, at: at(14), kind: Silent},
		{name: "limits do not count while it starts", accel: "kvm", spec: Spec{Timeout: time.Second, MaxSilent: time.Second},
			do: func(w *watch) { w.beat = at(50) }, at: at(60), reason: "did not start"},
		{name: "limits do not count for outputs", accel: "kvm", spec: Spec{Timeout: 10 * time.Second, MaxSilent: time.Second},
			do: func(w *watch) {
				w.enter(phaseRunning, at(1))
				w.enter(phaseSending, at(2))
				w.beat, w.active = at(50), at(30)
			},
			at: at(80), reason: "no sign of life"},
		{name: "outputs stop", accel: "kvm",
			do: func(w *watch) { w.enter(phaseSending, at(2)); w.beat, w.active = at(60), at(10) },
			at: at(70), reason: "outputs of the build did not arrive"},
		{name: "outputs trickle", accel: "kvm",
			do: func(w *watch) {
				w.enter(phaseSending, at(2))
				w.beat, w.active, w.arrived = at(650), at(650), 20<<20
			},
			at: at(622), reason: "arrive too slowly"},
		{name: "outputs trickle, emulated", accel: "tcg",
			do: func(w *watch) {
				w.enter(phaseSending, at(2))
				w.beat, w.active, w.arrived = at(6500), at(6500), 20<<20
			},
			at: at(6202), reason: "arrive too slowly"},
		{name: "phases do not go back", accel: "kvm", spec: Spec{Timeout: time.Second},
			do: func(w *watch) { w.enter(phaseSending, at(2)); w.enter(phaseRunning, at(3)); w.beat = at(60) },
			at: at(62), reason: "outputs of the build did not arrive"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWatch(tt.accel, &tt.spec, start)
			tt.do(w)
			next := w.next()
			if !next.at.Equal(tt.at) {
				t.Errorf("after %v, want %v", next.at.Sub(start), tt.at.Sub(start))
			}
			var failed *BuildError
			if errors.As(next.err, &failed) != (tt.kind != 0) || failed != nil && failed.Kind != tt.kind {
				t.Errorf("got %#v, want kind %v", next.err, tt.kind)
			}
			if !strings.Contains(next.err.Error(), tt.reason) {
				t.Errorf("got %q, want %q", next.err, tt.reason)
			}
		})
	}
}

// A badWriter takes n bytes.
type badWriter struct{ n int }

func (w *badWriter) Write(p []byte) (int, error) {
	if w.n -= len(p); w.n < 0 {
		return 0, errors.New("disk is full")
	}
	return len(p), nil
}

func TestLogPump(t *testing.T) {
	for _, tt := range []struct {
		name   string
		limit  int64
		to     io.Writer
		copied int64
		check  func(error) bool
	}{
		{"whole", 0, new(bytes.Buffer), 12, func(err error) bool { return err == io.EOF }},
		{"just fits", 12, new(bytes.Buffer), 12, func(err error) bool { return err == io.EOF }},
		{"too long", 11, new(bytes.Buffer), 11, func(err error) bool { return errors.Is(err, errLogLimit) }},
		{"cannot be kept", 0, &badWriter{7}, 6, isWriteError},
	} {
		t.Run(tt.name, func(t *testing.T) {
			host, guest := net.Pipe()
			p := startLogPump(host, tt.to, tt.limit)
			go func() {
				defer guest.Close()
				for range 2 {
					if _, err := guest.Write([]byte("line..")); err != nil {
						return
					}
				}
			}()
			<-p.done
			host.Close()
			copied, err, _ := p.state()
			if copied != tt.copied || !tt.check(err) {
				t.Errorf("%d bytes, %v", copied, err)
			}
			if b, ok := tt.to.(*bytes.Buffer); ok && b.String() != "line..line.."[:tt.copied] {
				t.Errorf("log %q", b)
			}
		})
	}
}

// A starved run never counts as the builder's own end, and a status of success
// does not hide it.
func TestJudge(t *testing.T) {
	b := &build{spec: &Spec{MemoryMiB: 512}, order: &link.BuildOrder{MaxProcesses: 100}, g: &guestVM{console: new(console), proc: &process{done: make(chan struct{})}}}
	for _, tt := range []struct {
		name string
		res  link.Result
		kind Kind // 0: our failure, -1: none
	}{
		{"success", link.Result{Kind: link.Exited}, -1},
		{"failure", link.Result{Kind: link.Exited, ExitStatus: 3}, Failed},
		{"signal", link.Result{Kind: link.Signaled, Signal: 11}, Failed},
		{"output missing", link.Result{Kind: link.OutputMissing}, OutputMissing},
		{"output refused", link.Result{Kind: link.OutputRefused}, OutputRefused},
		{"agent failed", link.Result{Kind: link.Internal}, 0},
		{"unknown", link.Result{Kind: "odd"}, 0},
		{"killed for memory", link.Result{Kind: link.Signaled, Signal: 9, OOMKills: 1}, OutOfMemory},
		{"a child killed for memory", link.Result{Kind: link.Exited, OOMKills: 1}, OutOfMemory},
		{"disk full", link.Result{Kind: link.Exited, ExitStatus: 1, DiskFull: true}, NoSpace},
		{"process limit", link.Result{Kind: link.Exited, ExitStatus: 1, ProcessLimit: 4}, ProcessLimit},
		{"disk failed", link.Result{Kind: link.Exited, ExitStatus: 1, IOErrors: true}, 0},
		{"agent failed for memory", link.Result{Kind: link.Internal, OOMKills: 1}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := b.judge(&tt.res)
			var failed *BuildError
			switch {
			case tt.kind == -1:
				if err != nil {
					t.Error(err)
				}
			case err == nil:
				t.Error("no failure")
			case errors.As(err, &failed) != (tt.kind > 0):
				t.Errorf("%v: whose failure?", err)
			case failed != nil && failed.Kind != tt.kind:
				t.Errorf("%v, want %v", failed.Kind, tt.kind)
			}
		})
	}
}

func TestEvent(t *testing.T) {
	for _, tt := range []struct {
		line string
		ends bool
	}{
		{`{"event": "GUEST_PANICKED", "data": {"action": "pause"}}`, true},
		{`{"event": "BLOCK_IO_ERROR", "data": {"nospace": true, "node-name": "scr", "action": "stop"}}`, true},
		{`{"event": "BLOCK_IO_ERROR", "data": {"node-name": "out", "action": "report"}}`, false},
		{`{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}`, true},
		{`{"event": "STOP"}`, true},
		{`{"event": "RTC_CHANGE", "data": {"offset": 1}}`, false},
		{`{"event": "VSERPORT_CHANGE", "data": {"open": true, "id": "x"}}`, false},
	} {
		m, err := decodeQMP([]byte(tt.line))
		if err != nil {
			t.Fatal(err)
		}
		e, err := m.event()
		if err != nil {
			t.Fatal(err)
		}
		if got := event(e); (got != nil) != tt.ends {
			t.Errorf("%s: %v", tt.line, got)
		}
	}
}
