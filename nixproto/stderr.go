package nixproto

import (
	"errors"
	"fmt"
)

// Codes of the messages that a worker sends before the answer to an operation.
const (
	codeNext          = 0x6f6c6d67
	codeRead          = 0x64617461
	codeWrite         = 0x64617416
	codeLast          = 0x616c7473
	codeError         = 0x63787470
	codeStartActivity = 0x53545254
	codeStopActivity  = 0x53544f50
	codeResult        = 0x52534c54
)

// A Level says how urgent a message is; lower is more.
type Level uint64

// The levels.
const (
	LevelError Level = iota
	LevelWarn
	LevelNotice
	LevelInfo
	LevelTalkative
	LevelChatty
	LevelDebug
	LevelVomit
)

// An ActivityType says what an activity is and so which fields it has.
type ActivityType uint64

// The activity types, with their fields.
const (
	ActUnknown       ActivityType = 0
	ActCopyPath      ActivityType = 100 // path, from, to
	ActFileTransfer  ActivityType = 101 // URL
	ActRealise       ActivityType = 102
	ActCopyPaths     ActivityType = 103
	ActBuilds        ActivityType = 104
	ActBuild         ActivityType = 105 // drv path, machine, round (1), rounds (1)
	ActOptimiseStore ActivityType = 106
	ActVerifyPaths   ActivityType = 107
	ActSubstitute    ActivityType = 108 // path, from
	ActQueryPathInfo ActivityType = 109 // path, from
	ActPostBuildHook ActivityType = 110 // drv path
	ActBuildWaiting  ActivityType = 111 // drv path and more
)

// A ResultType says what an activity reports and so which fields it has.
type ResultType uint64

// The result types, with their fields.
const (
	ResFileLinked       ResultType = 100 // size, blocks
	ResBuildLogLine     ResultType = 101 // line without newline
	ResUntrustedPath    ResultType = 102 // path
	ResCorruptedPath    ResultType = 103 // path
	ResSetPhase         ResultType = 104 // name
	ResProgress         ResultType = 105 // done, expected, running, failed
	ResSetExpected      ResultType = 106 // activity type, number
	ResPostBuildLogLine ResultType = 107 // line
	ResFetchStatus      ResultType = 108 // text
)

// A Field is a text or a number in an activity or a result.
type Field struct {
	IsText bool
	Number uint64
	Text   string
}

// TextField returns a field with a text.
func TextField(s string) Field { return Field{IsText: true, Text: s} }

// NumberField returns a field with a number.
func NumberField(n uint64) Field { return Field{Number: n} }

// A LogMessage is what a worker says before its answer to an operation: a
// pointer to one of the Log types.
type LogMessage interface {
	code() uint64
	fields(c codec)
}

// LogNext is a line for the client's terminal, its newline included.
type LogNext struct{ Text string }

// LogRead asks the client for data; only versions before those we speak do.
type LogRead struct{ Wanted uint64 }

// LogWrite is data for the client; unused today.
type LogWrite struct{ Data []byte }

// LogLast ends the messages of an operation that succeeded. The answer follows.
type LogLast struct{}

// LogError ends the messages of an operation that failed; no answer follows. It
// is the error that a Client returns.
type LogError struct {
	Level   Level
	Name    string // "Error" when empty; clients ignore it
	Message string
	Traces  []string
}

// LogStartActivity begins an activity. Ids must be unlike those of other
// servers that the client talks to.
type LogStartActivity struct {
	ID     uint64
	Level  Level
	Type   ActivityType
	Text   string
	Fields []Field
	Parent uint64 // 0 for none
}

// LogStopActivity ends an activity.
type LogStopActivity struct{ ID uint64 }

// LogResult reports something of an activity.
type LogResult struct {
	ID     uint64
	Type   ResultType
	Fields []Field
}

func (*LogNext) code() uint64          { return codeNext }
func (*LogRead) code() uint64          { return codeRead }
func (*LogWrite) code() uint64         { return codeWrite }
func (*LogLast) code() uint64          { return codeLast }
func (*LogError) code() uint64         { return codeError }
func (*LogStartActivity) code() uint64 { return codeStartActivity }
func (*LogStopActivity) code() uint64  { return codeStopActivity }
func (*LogResult) code() uint64        { return codeResult }

func (m *LogNext) fields(c codec)         { c.str(&m.Text, MaxMessage) }
func (m *LogRead) fields(c codec)         { c.u64(&m.Wanted) }
func (m *LogWrite) fields(c codec)        { c.bytes(&m.Data, MaxMessage) }
func (m *LogLast) fields(codec)           {}
func (m *LogStopActivity) fields(c codec) { c.u64(&m.ID) }

func (m *LogStartActivity) fields(c codec) {
	c.u64(&m.ID)
	c.u64((*uint64)(&m.Level))
	c.u64((*uint64)(&m.Type))
	c.str(&m.Text, MaxMessage)
	logFields(c, &m.Fields)
	c.u64(&m.Parent)
}

func (m *LogResult) fields(c codec) {
	c.u64(&m.ID)
	c.u64((*uint64)(&m.Type))
	logFields(c, &m.Fields)
}

func logFields(c codec, list *[]Field) {
	items(c, list, func(f *Field) {
		tag := uint64(0)
		if f.IsText {
			tag = 1
		}
		c.u64(&tag)
		switch f.IsText = tag == 1; tag {
		case 0:
			c.u64(&f.Number)
		case 1:
			c.str(&f.Text, MaxMessage)
		default:
			c.r.malformed("a field of the type %d", tag)
		}
	})
}

func (m *LogError) fields(c codec) {
	if c.v < 1<<8|26 {
		// Seen only by clients that are about to be refused.
		c.str(&m.Message, MaxMessage)
		c.unused(1) // exit status
		return
	}
	kind := "Error"
	c.str(&kind, maxSmall)
	if kind != "Error" {
		c.r.malformed("an error of the type %q", clip(kind))
	}
	c.u64((*uint64)(&m.Level))
	name := m.Name
	if name == "" {
		name = "Error"
	}
	c.str(&name, maxSmall)
	if m.Name = name; name == "Error" {
		m.Name = ""
	}
	c.str(&m.Message, MaxMessage)
	c.constant(0, "the position of an error")
	items(c, &m.Traces, func(t *string) {
		c.constant(0, "the position of a trace")
		c.str(t, MaxMessage)
	})
}

func (m *LogError) Error() string { return m.Message }

// WriteLog writes a message, without flushing. A client that sees the first byte
// of one waits for the rest, so nothing slow may come between WriteLog and Flush
// once part of it was flushed.
func WriteLog(w *Writer, v Version, m LogMessage) error {
	w.Uint64(m.code())
	m.fields(codec{w: w, v: v})
	return w.Err()
}

// ReadLog reads a message. The last one of an operation is a *LogLast or a
// *LogError. It returns io.EOF if the stream ends before the message.
func ReadLog(r *Reader, v Version) (LogMessage, error) {
	if err := r.Await(); err != nil {
		return nil, err
	}
	r.begin()
	code := r.u64()
	m := newLogMessage(code)
	if m == nil {
		r.malformed("a log message of the type %#x", code)
		return nil, r.Err()
	}
	m.fields(codec{r: r, v: v})
	return m, readError(r, named("log message"))
}

func newLogMessage(code uint64) LogMessage {
	switch code {
	case codeNext:
		return new(LogNext)
	case codeRead:
		return new(LogRead)
	case codeWrite:
		return new(LogWrite)
	case codeLast:
		return new(LogLast)
	case codeError:
		return new(LogError)
	case codeStartActivity:
		return new(LogStartActivity)
	case codeStopActivity:
		return new(LogStopActivity)
	case codeResult:
		return new(LogResult)
	}
	return nil
}

// WriteError writes err as the end of an operation that failed, without
// flushing.
func WriteError(w *Writer, v Version, err error) error {
	m, ok := errors.AsType[*LogError](err)
	if !ok {
		m = &LogError{Message: fmt.Sprint(err)}
	}
	return WriteLog(w, v, m)
}
