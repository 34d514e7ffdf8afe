package nixproto

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestLogMessages(t *testing.T) {
	for _, v := range workerVersions {
		for _, m := range sampleLogs() {
			roundTrip(t, m,
				func(w *Writer) error { return WriteLog(w, v, m) },
				func(r *Reader) (LogMessage, error) { return ReadLog(r, v) })
		}
	}
}

func TestLogMalformed(t *testing.T) {
	tests := map[string]func(*Writer){
		"code":           func(w *Writer) { w.Uint64(1) },
		"field type":     func(w *Writer) { writeAll(w, codeResult, 1, 101, 1, 2) },
		"error type":     func(w *Writer) { w.Uint64(codeError); w.Str("Warning") },
		"error position": func(w *Writer) { w.Uint64(codeError); w.Str("Error"); writeAll(w, 0, 0, 0, 1) },
	}
	for name, write := range tests {
		b := encoded(t, func(w *Writer) error { write(w); return nil })
		if m, err := ReadLog(NewReader(bytes.NewReader(b)), MaxWorker); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
}

func writeAll(w *Writer, numbers ...uint64) {
	for _, n := range numbers {
		w.Uint64(n)
	}
}

func TestWriteError(t *testing.T) {
	rich := &LogError{Level: LevelWarn, Message: "m", Traces: []string{"t"}}
	for _, test := range []struct {
		err  error
		want *LogError
	}{
		{errors.New("plain"), &LogError{Message: "plain"}},
		{&ValueError{errors.New("value")}, &LogError{Message: "value"}},
		{rich, rich},
	} {
		b := encoded(t, func(w *Writer) error { return WriteError(w, MaxWorker, test.err) })
		got, err := ReadLog(NewReader(bytes.NewReader(b)), MaxWorker)
		if d := cmp.Diff(LogMessage(test.want), got); err != nil || d != "" {
			t.Errorf("%v: %v\n%s", test.err, err, d)
		}
	}
}

// TestOldError: clients that are too old learn it in the layout they know.
func TestOldError(t *testing.T) {
	got := encoded(t, func(w *Writer) error { return WriteError(w, 0x115, errors.New("too old")) })
	want := encoded(t, func(w *Writer) error { w.Uint64(codeError); w.Str("too old"); w.Uint64(1); return nil })
	if !bytes.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
