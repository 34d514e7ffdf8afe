package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"nbd/nixproto"
	"nbd/vm/link"
)

// Guests and QEMUs that have been taken over. Whatever they do, a run ends, in
// time, as what it is, and nothing is left of it.

// fakeStarts are what QEMUs do that are hostile from their start on.
var fakeStarts = map[string]func(*fakeGuest){
	"no-qmp":      func(g *fakeGuest) {},
	"qmp-garbage": func(g *fakeGuest) { flood(g.qmp, []byte("\x00\xff{]\n")) },
	"qmp-line":    func(g *fakeGuest) { flood(g.qmp, bytes.Repeat([]byte("x"), 64<<10)) },
	"qmp-events": func(g *fakeGuest) {
		fmt.Fprintln(g.qmp, `{"QMP": {}}`)
		flood(g.qmp, []byte(`{"event": "JOB", "data": {}}`+"\n"))
	},
	"qmp-deaf": func(g *fakeGuest) { fmt.Fprintln(g.qmp, `{"QMP": {}}`) },
	"exits":    func(g *fakeGuest) { os.Exit(0) },
	"mute":     func(g *fakeGuest) { g.answerQMP() },
	"garbage":  func(g *fakeGuest) { go g.answerQMP(); flood(g.ctl, []byte("garbage")) },
	"huge":     func(g *fakeGuest) { go g.answerQMP(); g.ctl.Write(frame(1<<32-1, "{")); flood(g.ctl, []byte("{")) },
	"half":     func(g *fakeGuest) { go g.answerQMP(); g.ctl.Write(frame(100, "{")) },
	"liar":     func(g *fakeGuest) { go g.answerQMP(); g.say(&link.Awake{}) },
	"old":      func(g *fakeGuest) { go g.answerQMP(); g.say(&link.Hello{Version: link.Version - 1}) },
	"deaf": func(g *fakeGuest) {
		go g.answerQMP()
		g.say(&link.Hello{Version: link.Version}, &link.Awake{})
	},
}

func TestHostileStarts(t *testing.T) {
	hasten(t, 150)
	program := fakeProgram(t)
	for start, want := range map[string]string{
		"no-qmp":      "QEMU did not start in time",
		"qmp-garbage": "QMP",
		"qmp-line":    "buffer full",
		"qmp-events":  "QMP events come faster",
		"qmp-deaf":    "QEMU did not start in time",
		"exits":       "QEMU: exit status 0",
		"mute":        "did not boot in time",
		"garbage":     "frame is too long",
		"huge":        "frame is too long",
		"half":        "did not boot in time",
		"liar":        "not hello",
		"old":         "not hello",
		"deaf":        "did not take the order in time",
	} {
		t.Run(start, func(t *testing.T) {
			t.Parallel()
			blobs := memBlobs{}
			r := newFakeRunner(t, program, start, blobs)
			s := shellSpec(start, "true", blobs, file("input"), t)
			if start == "deaf" { // more than fits into a socket's buffer
				s.Drv.Env["large"], s.Drv.Env["passAsFile"] = strings.Repeat("x", 8<<20), "large"
			}
			_, err := r.Run(t.Context(), s, io.Discard, new(memOutputs))
			checkOurFailure(t, err, want)
		})
	}
}

// checkOurFailure checks that err is not the build's.
func checkOurFailure(t *testing.T, err error, want string) {
	t.Helper()
	var failed *BuildError
	if err == nil || errors.As(err, &failed) || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want our failure with %q", err, want)
	}
}

// fakePlays are what hostile guests do with a build.
var fakePlays = map[string]func(*fakeGuest){
	"honest": func(g *fakeGuest) {
		g.say(&link.Started{})
		g.log.Write([]byte("built\n"))
		g.succeed(fakeNAR, int64(len(fakeNAR)))
	},
	"silent":  func(g *fakeGuest) {},
	"hang":    func(g *fakeGuest) { g.say(&link.Started{}) },
	"stop":    func(g *fakeGuest) { g.say(&link.Started{}); syscall.Kill(os.Getpid(), syscall.SIGSTOP) },
	"die":     func(g *fakeGuest) { g.say(&link.Started{}); os.Exit(1) },
	"close":   func(g *fakeGuest) { g.say(&link.Started{}); g.ctl.Close() },
	"chatter": func(g *fakeGuest) { g.say(&link.Started{}); flood(g.ctl, frame(25, `{"type":"beat","body":{}}`)) },
	"garbage": func(g *fakeGuest) { g.say(&link.Started{}); flood(g.ctl, []byte{0, 1, 0, 0, '{', 0xff}) },
	"turn":    func(g *fakeGuest) { g.say(&link.Started{}, &link.Awake{}) },
	"twice":   func(g *fakeGuest) { g.say(&link.Started{}, &link.Started{}) },
	"early":   func(g *fakeGuest) { g.say(&link.Outputs{}) },
	"nothing": func(g *fakeGuest) { g.say(&link.Started{}, &link.Result{Kind: link.Exited}) },
	"less":    func(g *fakeGuest) { g.say(&link.Started{}, &link.Outputs{}, &link.Result{Kind: link.Exited}) },
	"size":    func(g *fakeGuest) { g.say(&link.Started{}); g.succeed(fakeNAR, 1<<62) },
	"short":   func(g *fakeGuest) { g.say(&link.Started{}); g.succeed(fakeNAR[:len(fakeNAR)-8], int64(len(fakeNAR))) },
	"unknown": func(g *fakeGuest) { g.say(&link.Started{}, &link.Result{Kind: "won"}) },
	"lost-log": func(g *fakeGuest) {
		g.say(&link.Started{}, &link.Result{Kind: link.Exited, ExitStatus: 1, LogBytes: 1 << 62})
	},
	"loud": func(g *fakeGuest) { g.say(&link.Started{}); flood(g.log, make([]byte, 64<<10)) },
	"console": func(g *fakeGuest) {
		go flood(os.Stdout, bytes.Repeat([]byte("\x1b[31mnoise\n"), 1000))
		g.say(&link.Started{}, &link.Result{Kind: link.Exited, ExitStatus: 3})
	},
	"boast": func(g *fakeGuest) {
		g.say(&link.Started{}, &link.Result{Kind: link.OutputRefused, Message: strings.Repeat("m", 900<<10),
			Usage: link.Usage{CPUUser: -1, CPUSystem: 1 << 62, PeakMemory: 1 << 62, PeakScratch: 1 << 62}})
	},
	"no-nar":   func(g *fakeGuest) { g.say(&link.Started{}); g.succeed(bytes.Repeat([]byte("no NAR"), 1000), 6000) },
	"hole":     func(g *fakeGuest) { g.say(&link.Started{}); g.connect(g.sink).write(make([]byte, 4096), 1<<30) },
	"endless":  func(g *fakeGuest) { g.say(&link.Started{}); g.endless() },
	"two":      func(g *fakeGuest) { g.say(&link.Started{}); g.succeed(append(aligned(fakeNAR), fakeNAR...), 0) },
	"sink-raw": func(g *fakeGuest) { g.say(&link.Started{}); flood(g.sink.conn, []byte("this is no protocol")) },
	"overwrite": func(g *fakeGuest) {
		c := g.connect(g.inputs)
		c.write([]byte("changed"), 0)
		c.do(nbdCmdTrim, 0, 1<<20, nil, nil)
		c.do(nbdCmdWriteZeroes, 0, 1<<20, nil, nil)
		fakeEnd(g, 10)
	},
	"beyond": func(g *fakeGuest) {
		c := g.connect(g.inputs)
		for _, at := range []uint64{DiskSize, DiskSize - 1, 1 << 63, 1<<64 - 1} {
			if c.do(nbdCmdRead, at, 4096, nil, make([]byte, 4096)) == nil {
				fakeEnd(g, 1)
			}
		}
		c.do(nbdCmdRead, 3, 5, nil, make([]byte, 5))
		c.do(nbdCmdRead, 0, 1<<32-1, nil, nil)
		fakeEnd(g, 10)
	},
	"reads": func(g *fakeGuest) { // and never takes an answer
		g.inputs.hello(3)
		g.inputs.option(nbdOptGo, goData(""))
		g.say(&link.Started{})
		flood(g.inputs.conn, requestBytes(nbdRequest{nbdCmdRead, 1, 0, 32 << 20}))
	},
	"half-request": func(g *fakeGuest) {
		g.sink.hello(3)
		g.sink.option(nbdOptGo, goData(""))
		g.sink.conn.Write(requestBytes(nbdRequest{nbdCmdWrite, 1, 0, 32 << 20})[:20])
		g.say(&link.Started{})
	},
	"half-write": func(g *fakeGuest) {
		g.sink.hello(3)
		g.sink.option(nbdOptGo, goData(""))
		g.sink.conn.Write(append(requestBytes(nbdRequest{nbdCmdWrite, 1, 0, 1 << 20}), fakeNAR[:100]...))
		g.say(&link.Started{})
	},
}

// fakeEnd ends a build with an exit status.
func fakeEnd(g *fakeGuest, status int) {
	g.say(&link.Started{}, &link.Result{Kind: link.Exited, ExitStatus: status})
}

// fakeNAR is the output of an honest guest.
var fakeNAR = fileNAR("contents")

// fileNAR returns the archive of a file.
func fileNAR(contents string) []byte {
	var b bytes.Buffer
	for _, s := range []string{"nix-archive-1", "(", "type", "regular", "contents", contents, ")"} {
		b.Write([]byte{byte(len(s)), byte(len(s) >> 8), byte(len(s) >> 16), byte(len(s) >> 24), 0, 0, 0, 0})
		b.WriteString(s)
		b.Write(make([]byte, (8-len(s)%8)%8))
	}
	return b.Bytes()
}

// aligned returns b with the zeros that follow it on the sink.
func aligned(b []byte) []byte {
	return append(bytes.Clone(b), make([]byte, (link.OutputAlign-len(b)%link.OutputAlign)%link.OutputAlign)...)
}

// endless sends a file of 1 TiB.
func (g *fakeGuest) endless() {
	head := fileNAR("")[:len(fileNAR(""))-24]
	head = append(head, 0, 0, 0, 0, 0, 1, 0, 0)
	block := append(head, make([]byte, 64<<10-len(head))...)
	c := g.connect(g.sink)
	for off := int64(0); c.write(block, off) == nil; off += int64(len(block)) {
		clear(block)
	}
}

func TestHostilePlays(t *testing.T) {
	hasten(t, 150)
	blobs := memBlobs{}
	archive := file("input").archive(t)
	specs := map[string]*Spec{}
	for play := range fakePlays {
		s := shellSpec(play, "true", blobs, file("input"), t)
		s.Drv.Env["play"], s.MaxLog = play, 1<<20
		specs[play] = s
	}
	r := newFakeRunner(t, fakeProgram(t), "agent", blobs)
	t.Cleanup(func() {
		if n := r.Status().Guests; n != 0 {
			t.Errorf("%d guests are left", n)
		}
	})
	for _, tt := range []struct {
		play   string
		kind   Kind   // 0: our failure, or none
		reason string // "": success
	}{
		{play: "honest"},
		{"silent", 0, "no sign of life"},
		{"hang", 0, "no sign of life"},
		{"stop", 0, "no sign of life"},
		{"die", 0, "ended without a result"},
		{"close", 0, "ended without a result"},
		{"chatter", 0, "says more than it has to"},
		{"garbage", 0, "decode frame"},
		{"turn", 0, "out of turn"},
		{"twice", 0, "said twice"},
		{"early", 0, "out of turn"},
		{"nothing", 0, "success without outputs"},
		{"less", 0, "did not arrive whole"},
		{"size", 0, "did not arrive whole"},
		{"short", OutputRefused, "refused"},
		{"unknown", 0, "unknown end"},
		{"lost-log", 0, "log did not arrive in time"},
		{"loud", LogLimit, "longer than 1048576 bytes"},
		{"console", Failed, "exit code 3"},
		{"boast", OutputRefused, "mmmm"},
		{"no-nar", OutputRefused, "refused"},
		{"hole", OutputRefused, "expected at 0"},
		{"endless", OutputRefused, "more than 1048576 bytes"},
		{"two", OutputRefused, "more than the 1 expected"},
		{"sink-raw", 0, "no sign of life"},
		{"overwrite", Failed, "exit code 10"},
		{"beyond", Failed, "exit code 10"},
		{"reads", 0, "no sign of life"},
		{"half-request", 0, "no sign of life"},
		{"half-write", 0, "no sign of life"},
	} {
		t.Run(tt.play, func(t *testing.T) {
			t.Parallel()
			ctx, stop := context.WithTimeout(t.Context(), time.Minute)
			defer stop()
			outs := new(memOutputs)
			_, err := r.Run(ctx, specs[tt.play], io.Discard, outs)
			var failed *BuildError
			switch {
			case tt.reason == "":
				if err != nil || !bytes.Equal(outs.nars["out"].Bytes(), fakeNAR) {
					t.Errorf("got %v, %q", err, outs.nars)
				}
			case tt.kind == 0:
				checkOurFailure(t, err, tt.reason)
			case !errors.As(err, &failed) || failed.Kind != tt.kind || !strings.Contains(failed.Message, tt.reason) || len(failed.Message) > 20<<10:
				t.Errorf("got %.300v, want %v with %q", err, tt.kind, tt.reason)
			case failed.Result.CPUUser < 0 || failed.Result.CPUSystem > 2*time.Minute || failed.Result.PeakMemory > 512<<20 || failed.Result.PeakScratch > 2<<30:
				t.Errorf("result %+v", failed.Result)
			}
			if tt.reason != "" && strings.Contains(strings.Join(outs.ends, " "), "closed") && tt.play != "two" && tt.play != "size" {
				t.Errorf("outputs %q", outs.ends)
			}
			if !bytes.Equal(blobs[nixproto.SumSHA256(archive)], archive) {
				t.Error("an input was changed")
			}
		})
	}
}
