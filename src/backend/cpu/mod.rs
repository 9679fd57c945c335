//! stub until merge
