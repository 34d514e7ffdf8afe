package guest

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"nbd/vm/link"
)

// TestAgentRefuses has what a host must not ask of its guest.
func TestAgentRefuses(t *testing.T) {
	short := &link.Wake{Entropy: make([]byte, link.MinEntropy-1), Time: 1}
	for _, tt := range []struct {
		name string
		a    *agent
		m    link.Message
		want string
	}{
		{"build before wake", &agent{}, &link.BuildOrder{}, "before wake"},
		{"second build", &agent{awake: true, build: &build{}}, &link.BuildOrder{}, "second build"},
		{"too little entropy", &agent{}, short, "63 bytes of entropy are not enough"},
		{"what a guest says", &agent{awake: true}, &link.Beat{}, "host sent *link.Beat"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.a.handle(tt.m); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestAgentSaysHello(t *testing.T) {
	host, guest := net.Pipe()
	defer host.Close()
	defer guest.Close()
	sent := make(chan error, 1)
	go func() { sent <- (&agent{conn: link.Guest(guest)}).hello() }()
	m, err := link.Host(host).Receive()
	must(t, err, <-sent)
	if h, ok := m.(*link.Hello); !ok || h.Version != link.Version || h.Kernel == "" {
		t.Errorf("got %+v", m)
	}
}

// TestBuildFailureIsInternal sees that a build for which the guest has no disks
// is told as the guest's failure.
func TestBuildFailureIsInternal(t *testing.T) {
	order := &link.BuildOrder{Inputs: []string{"../x"}}
	err := newTestStage(t).furnish(t.TempDir(), order)
	if err == nil {
		t.Fatal("an input with such a name was found")
	}
	for _, tt := range []struct {
		err  error
		want link.Result
	}{
		{err, link.Result{Kind: link.Internal, Message: `make sandbox: bad file name "../x"`}},
		{refused("file %d", 1), link.Result{Kind: link.OutputRefused, Message: "file 1"}},
	} {
		r := &link.Result{}
		judge(r, tt.err)
		if diff := cmp.Diff(&tt.want, r); diff != "" {
			t.Error(diff)
		}
	}
}

// A greedyLog is a builder that writes 1 MiB as fast as it can.
type greedyLog struct{ read int }

func (g *greedyLog) Read(b []byte) (int, error) {
	n := min(len(b), 1<<20-g.read)
	if n == 0 {
		return 0, io.EOF
	}
	for i := range b[:n] {
		b[i] = byte(g.read + i)
	}
	g.read += n
	return n, nil
}

// TestPumpWaits sees that the reader stops when nobody takes the log, and that
// nothing is lost.
func TestPumpWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out, w := io.Pipe()
		in := &greedyLog{}
		var written int64
		var err error
		go func() {
			written, err = pump(w, in)
			w.Close()
		}()
		synctest.Wait()
		// What waits, what is being written, and what was read last.
		if in.read < pumpSize || in.read > 2*pumpSize+32<<10 {
			t.Errorf("%d bytes were read that nobody took", in.read)
		}
		got, readErr := io.ReadAll(out)
		must(t, readErr, err)
		if written != 1<<20 || len(got) != 1<<20 {
			t.Errorf("%d bytes written, %d arrived", written, len(got))
		}
		for i, b := range got {
			if b != byte(i) {
				t.Fatalf("byte %d is %d", i, b)
			}
		}
	})
}

// TestUsage reads a cgroup's files as kernel 6.1 writes them.
func TestUsage(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"cpu.stat":      "usage_usec 3500000\nuser_usec 2000000\nsystem_usec 1500000\nnr_periods 0\n",
		"memory.events": "low 0\nhigh 0\nmax 12\noom 1\noom_kill 3\noom_group_kill 1\n",
		"pids.events":   "max 5\n",
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	c := &cgroup{dir: dir}
	want := usage{cpuUser: 2 * time.Second, cpuSystem: 1500 * time.Millisecond, oomKills: 3, processLimit: 5}
	got, err := c.usage()
	must(t, err)
	if got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	must(t, os.WriteFile(filepath.Join(dir, "memory.peak"), []byte("4096000\n"), 0o644))
	want.peakMemory = 4096000
	if got, err = c.usage(); got != want || err != nil {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	must(t, os.WriteFile(filepath.Join(dir, "pids.events"), []byte("max many\n"), 0o644))
	if _, err := c.usage(); err == nil {
		t.Error("no error for a file that says nothing")
	}
}

// TestProcessLimit watches files that do not tell of changes, like those of a
// cgroup that has met its limit already, and of one that never does.
func TestProcessLimit(t *testing.T) {
	for text, want := range map[string]int{"max 0\n": 0, "max 2\n": 1} {
		c := &cgroup{dir: t.TempDir()}
		must(t, os.WriteFile(filepath.Join(c.dir, "pids.events"), []byte(text), 0o644))
		calls := make(chan struct{}, 10)
		stop, err := c.onProcessLimit(func() { calls <- struct{}{} })
		must(t, err)
		if want == 1 {
			<-calls
			calls <- struct{}{}
		}
		must(t, stop())
		if len(calls) != want {
			t.Errorf("%q: %d calls", text, len(calls))
		}
	}
}

func TestMemoryLimit(t *testing.T) {
	all, err := memoryLimit(0)
	must(t, err)
	some, err := memoryLimit(16)
	must(t, err)
	most, err := memoryLimit(1 << 40)
	must(t, err)
	if some != 16<<20 || most != all || all <= some {
		t.Errorf("limits are %d, %d, %d", all, some, most)
	}
}
