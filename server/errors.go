package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"syscall"

	"nbd/nixproto"
	"nbd/store"
)

// A refusal is an error whose text is meant for the client: the request is at
// fault, or what it asks for is not served.
type refusal struct{ msg string }

func (e *refusal) Error() string { return e.msg }

// refusef makes a refusal. The text is one sentence that names the thing and,
// where there is one, the way out; it holds no path of the host.
func refusef(format string, args ...any) error {
	return &refusal{msg: fmt.Sprintf(format, args...)}
}

// errGone ends the work for a client that is no longer there.
var errGone = errors.New("client is gone")

// notValid is the answer about a path that is not in the client's view,
// whether or not others have it. Old clients look for "is not valid".
func notValid(p nixproto.StorePath) error { return refusef("path '%s' is not valid", p) }

// explain turns an error into what the client of session s is told, and into
// the level at which the server logs it. What is no fault of the request is
// not shown in detail: it may hold paths of the host.
func explain(s *Session, err error) (text string, level slog.Level) {
	var refused *refusal
	var value *nixproto.ValueError
	var unknown *nixproto.UnknownOpError
	switch {
	case errors.As(err, &refused):
		return printable(refused.msg), slog.LevelDebug
	case errors.As(err, &value):
		return printable(value.Error()), slog.LevelDebug
	case errors.As(err, &unknown):
		return unknown.Error() + " by this server", slog.LevelInfo
	case errors.Is(err, store.ErrBusy):
		return printable(err.Error()), slog.LevelWarn
	case errors.Is(err, store.ErrInvalid), errors.Is(err, store.ErrInUse):
		return printable(err.Error()), slog.LevelInfo
	case errors.Is(err, store.ErrNotFound):
		return printable(err.Error()), slog.LevelDebug
	case errors.Is(err, store.ErrNoSpace), errors.Is(err, syscall.ENOSPC):
		return "the server has no space left on its disk; its operator has been told", slog.LevelError
	case gone(err):
		return "the connection ended", slog.LevelDebug
	case errors.Is(err, nixproto.ErrMalformed), errors.Is(err, nixproto.ErrTrailing):
		return printable(err.Error()), slog.LevelInfo
	case errors.Is(err, errEnding), errors.Is(err, store.ErrClosed):
		return "the server is shutting down; try again later", slog.LevelInfo
	default:
		return fmt.Sprintf("the server had an internal error; its log says more under session %s", s.ID), slog.LevelError
	}
}

// gone reports whether an error only says that the client has left.
func gone(err error) bool {
	return errors.Is(err, errGone) || errors.Is(err, context.Canceled) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.ErrClosedPipe)
}

// printable keeps control characters that came from a path or a builder out of
// what a client prints.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if (r < ' ' && r != '\n' && r != '\t') || r == 0x7f {
			return '?'
		}
		return r
	}, s)
}

// failedResult is the answer to a build request that led to no build, or to no
// result of one. Faults of the server may pass, those of the request do not.
func failedResult(s *Session, err error) *nixproto.BuildResult {
	text, level := explain(s, err)
	s.Log.Log(context.Background(), level, "build request failed", "err", err)
	status := nixproto.MiscFailure
	if level >= slog.LevelWarn || errors.Is(err, errEnding) {
		status = nixproto.TransientFailure
	}
	return &nixproto.BuildResult{Status: status, Error: text}
}
