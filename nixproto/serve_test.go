package nixproto

import (
	"bytes"
	"errors"
	"reflect"
	"testing"
)

var serveVersions = []Version{0x205, 0x206, 0x207}

func TestServeRequests(t *testing.T) {
	for _, v := range serveVersions {
		for i, req := range sampleServeRequests(v) {
			if req.Command() != ServeCommand(i+1) || reflect.TypeOf(req).Elem().Name() != "Serve"+req.Command().String() {
				t.Errorf("%T is command %d, %v", req, req.Command(), req.Command())
			}
			roundTrip(t, req,
				func(w *Writer) error { return WriteServeRequest(w, v, req) },
				func(r *Reader) (ServeRequest, error) { return ReadServeRequest(r, v) })
			for _, resp := range sampleServeResponses(v, req) {
				roundTrip(t, resp,
					func(w *Writer) error { return WriteResponse(w, v, resp) },
					func(r *Reader) (Response, error) { return ReadServeResponse(r, v, req) })
			}
		}
	}
}

func TestServeUnknownCommand(t *testing.T) {
	for _, n := range []uint64{0, 10, 1 << 40} {
		b := encoded(t, func(w *Writer) error { w.Uint64(n); return nil })
		_, err := ReadServeRequest(NewReader(bytes.NewReader(b)), MaxServe)
		if e, ok := errors.AsType[*UnknownOpError](err); !ok || e.Number != n {
			t.Errorf("command %d: %v", n, err)
		}
	}
}

// TestServeSuccess: clients lose step when BuildPaths answers a success other
// than 0.
func TestServeSuccess(t *testing.T) {
	for _, status := range []BuildStatus{Built, Substituted, AlreadyValid, ResolvesToAlreadyValid} {
		b := encoded(t, func(w *Writer) error {
			return WriteResponse(w, MaxServe, &ServeBuildStatus{Status: status, Error: "ignored"})
		})
		if !bytes.Equal(b, make([]byte, 8)) {
			t.Errorf("status %d is written as %q", status, b)
		}
	}
}
